"""How a weight becomes codes: one file a published method, each a pure function ``round_weight(weight, bits, group, seen)``.

| method | what it chooses | reads |
|---|---|---|
| nearest | nothing: max|w| / m, nearest code | |
| mse | the scale, for Σ|w - ŵ|^norm | |
| hessian_weighted | the scale, for Σ h_k (w - ŵ)² | hessian or mean_square |
| awq | the scale, for each group's part of the output (clip search) | hessian |
| gptq | the codes, each column making up for those before | hessian |
| gptaq | the same, for the float model's output | hessian, cross |
| adaround | up or down, by learning | rows |
| flexq | nearest, 6 bits, groups of 128, with activations of 6 or 8 bits | |
"""
