"""The command line: the local cluster (`hearth up`) and the verbs that talk to a running one."""
