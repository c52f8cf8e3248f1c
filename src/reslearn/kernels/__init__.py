"""C++ kernels, the code that compiles them, and fuse(), which applies them to a network."""
