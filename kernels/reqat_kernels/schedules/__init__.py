"""Programs of many schedules, and what each is worth: convolutions of INT8 and INT4 on CPUs, FP4 products on GPUs.

What is measured here is searched in :mod:`reqat.methods.search`.
"""
