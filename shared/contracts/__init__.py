"""What crosses a process boundary, one file per conversation.

Rules: every type is a frozen, keyword-only `msgspec.Struct`; within `v1` a message may only gain fields with
defaults; quantities carry their unit in the name (`_s`, `_bytes`, `_tokens`). `tests/contracts` keeps golden bytes.
"""
