"""Sets with boxes and masks: VOC, COCO, YOLO; anchors; what serves images with their targets."""
