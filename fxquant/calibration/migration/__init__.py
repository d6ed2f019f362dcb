"""Migrations: factors [K] by which a linear's input is divided and its weight multiplied, and rotations. The function stays.

| method | what it gives | from |
|---|---|---|
| smoothquant | factor a^α / w^(1-α) | absmax of the input, of the weights |
| smoothquant_plus | one α for a whole model | an error function of the caller |
| awq | factor from mean magnitudes, exponent searched | mean_abs, hessian |
| power | factor from the input alone: a power, or a / log2(2 + a) | absmax |
| fireq | factors from the weight alone, scales that commute with rotary embeddings | weights, keys |
| hadamard, quarot | orthogonal matrices, rotated weights of a decoder | a seed |
| lord | two thin linears for one | hessian, mean |
"""
