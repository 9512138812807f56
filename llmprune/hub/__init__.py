"""Downloading models from the Hugging Face hub and publishing finished folders there."""
