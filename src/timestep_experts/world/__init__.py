"""The embedded world: captioned scenes made by code, and the judge that reads them back."""
