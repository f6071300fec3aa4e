"""Profiles: what machines and models are modelled as. Every number in one says where it comes from.

profile     reads and writes them
measuring   `hearth profile`: measures this machine
*.toml      those that come with Hearth
"""
