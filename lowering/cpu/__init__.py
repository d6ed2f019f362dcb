"""C++ kernels and the build of the library that holds them."""
