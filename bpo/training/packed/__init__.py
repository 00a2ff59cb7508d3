from bpo.training.packed.trainer import PackedDPOTrainer

__all__ = ["PackedDPOTrainer"]
