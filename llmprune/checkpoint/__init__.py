"""The only room that touches weight files: safetensors in, safetensors out, nothing is ever unpickled."""
