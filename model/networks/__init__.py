"""The networks: UNet, autoencoders, text encoders and their tokenizer."""
