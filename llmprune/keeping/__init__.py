"""Zeros kept in training loops of others: masks on the parameters of a model in memory, in LoRA layers."""
