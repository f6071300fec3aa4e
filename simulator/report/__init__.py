"""What runs came to: figures with confidence intervals, the offline optimum of DRAM, tables, JSON, plots.

intervals   the mean over seeds and its 95 % confidence interval
optimum     how many loads any cache of this size could have served from DRAM
figures     one run as figures; several seeds as means with intervals
tables      for people: terminal and markdown, and documents that hold tables between two marks
plots       pictures, where matplotlib is installed
"""
