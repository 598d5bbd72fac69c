"""Decode-time methods by name: `from logitmix.presets import dexperts`; see docs/family.md."""

from logitmix.mixture.presets import contrastive_decoding, dexperts, ensemble, guidance, proxy_tuning

__all__ = ["contrastive_decoding", "dexperts", "ensemble", "guidance", "proxy_tuning"]
