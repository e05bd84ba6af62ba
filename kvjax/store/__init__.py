"""The KV cache as a durable asset: blocks of KV in tiers, found by what was read, verified before they are used.

It knows bytes and keys, never models: what a block looks like comes from whoever opens the store.
"""
