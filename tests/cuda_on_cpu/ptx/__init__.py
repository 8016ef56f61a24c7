"""PTX text to C++ that runs on the executor."""
