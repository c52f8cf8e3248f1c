"""Where the object of an image is: boxes for each class on a classification network (DRL appendix C)."""
