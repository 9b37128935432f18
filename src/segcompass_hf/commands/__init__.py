# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Commands of `segcompass`, one module each: `add_parser(commands)` registers it, imports that cost time stand inside.

Bad input is `segcompass_hf.cli.UserError`, shown as one line with exit code 2.
"""
