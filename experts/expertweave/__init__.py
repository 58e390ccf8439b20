"""ExpertWeave inside vLLM: many ESFT adapters over one mixture-of-experts base, in one batch.

`plugin.register` is called by vLLM in each of its processes (`vllm.general_plugins`); `settings` says what is wanted.
"""
