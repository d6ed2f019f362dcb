"""From fxquant:: operators to code: packing, tile sizes, CPU kernels, Inductor."""
