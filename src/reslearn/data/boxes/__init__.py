"""Sets with boxes and masks (VOC, COCO), anchors, and batches of images with targets."""
