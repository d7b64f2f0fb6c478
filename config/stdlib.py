# The default run: a small model of Qwen3's architecture on Python's own standard library, five minutes on two CPU cores.
dataset = 'stdlib'
