"""Independent evaluations the engine is compared with: a float64 model in numpy, transformers, llama.cpp."""
