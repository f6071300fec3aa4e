"""The cluster in virtual time: the production cores of the services in a modelled network, on modelled hardware.

What decides is production code (`services.*.core`); what carries out is modelled: time (`kernel`), the bus (`network`),
the work queue (`queue`), an engine (`engine`). A shell here does what a service's shell does, with effects on models
instead of the world (`process`, `gateway`, `worker`). A run is a function of its seed.
"""
