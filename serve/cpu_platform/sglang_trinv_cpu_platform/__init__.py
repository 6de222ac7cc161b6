"""SGLang on a machine without a GPU, for tests: see README.md beside this package."""
