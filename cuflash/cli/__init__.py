"""The commands of python -m cuflash, one module each."""
