"""Does this package fit an SGLang release? Looked up in its sources, and tried on a CPU."""
