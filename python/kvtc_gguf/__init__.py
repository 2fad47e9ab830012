"""kvtc_gguf: calibrations for the compressed key/value cache of llama.cpp, as GGUF files.

`format` reads and writes them, `reference` is the numpy twin of the C++ operations, `fingerprint` ties a calibration
to its model, `embed` and `extract` move one in and out of a model's GGUF, `inspect` prints, `report` draws and
`verify` checks one, `plan` says how long a context fits.
The format itself is described in `ggml_kvtc/README.md`.
"""

__version__ = "0.1.0"
