"""Real draft/target pairs: loading, the lossless rule, coupled recordings and live decoding.

The only package where torch is imported. `realmodels.verify` needs torch alone; transformers is imported when a
model is loaded or read.
"""
