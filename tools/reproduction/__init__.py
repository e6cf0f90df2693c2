"""The paper's comparison, reproduced small: one file per family of methods, one JSON result per cell."""
