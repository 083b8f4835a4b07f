"""LoRA adapters on megatron-core: tensors, never jobs. The door is `megatron_adapters.engine.Engine`."""
