"""Training: one recipe (YAML) a model, one resumable loop for CPU, GPU and several GPUs."""
