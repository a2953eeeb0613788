"""Weights of whole models: merging files, searching for merge weights, LoRAs in and out, what experts changed.

This room knows safetensors and torch, and a loaded base where a loss is measured; it knows no recipe and no command.
"""
