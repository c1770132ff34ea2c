"""Merges: one model out of several, as functions of their arguments.

Nothing here knows of a session, a trainer or a card; nothing but :mod:`automode.merges.moe_files` touches a file; global
random state is left as it was. What cannot be merged is refused with a :class:`automode.errors.MergeError` that names the
tensor and the way out.

* :mod:`~automode.merges.trajectory`: EMA at two horizons and a tail average beside a live run.
* :mod:`~automode.merges.averages`, :mod:`~automode.merges.soups`: means, interpolation, greedy and Fisher soups.
* :mod:`~automode.merges.fisher`, :mod:`~automode.merges.norm_statistics`: what some of them need from data.
* :mod:`~automode.merges.lora`, :mod:`~automode.merges.adapter_fuse`: low-rank specialists and their fusion.
* :mod:`~automode.merges.gate_evidence`, :mod:`~automode.merges.gate`, :mod:`~automode.merges.moe`,
  :mod:`~automode.merges.moe_files`: the router, the unified model, and its file format.
* :mod:`~automode.merges.distill`: many networks into one.
* :mod:`~automode.merges.methods`: the menu, one call for all of them.
"""
