"""Programs of many schedules: convolutions of INT8 and INT4 on CPUs, FP4 matrix products on GPUs, and what each is worth.

What is measured here is searched in :mod:`reqat.methods.search`.
"""
