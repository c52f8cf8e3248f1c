"""Photos and small images: decoding, folders, ImageNet, packed sets and batches."""
