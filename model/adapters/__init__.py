"""Adapters (LoRA and its relatives): what a request asks for, what a file holds, how weights are changed."""
