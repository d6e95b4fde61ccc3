"""The stages of the loop, one module each. A stage reads sealed folders and writes its own."""
