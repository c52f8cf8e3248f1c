"""Photos and small images: decoding, folders, ImageNet, packed sets, and what serves batches of them."""
