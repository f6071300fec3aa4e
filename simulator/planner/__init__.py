"""How many machines a workload needs.

slo      what is asked for, such as "p99 startup 5s"
search   the least servers for each size of DRAM, and which of these plans are worth a look
"""
