# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Recipes, what `segcompass train` runs: a yaml file of stages, checked, run in order, resumed and summed up.

settings (yaml -> stages) -> rows, parts (what a stage starts from) -> check (before the first step) -> running, with
records of what is done -> summary (curves, settings, times).
"""
