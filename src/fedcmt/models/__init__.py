"""Networks nnU-Net lacks, and the rule from parameter names to scopes."""
