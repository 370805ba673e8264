"""A model into another file: which type each matrix gets, what decides its rounding, and the file itself."""
