"""The data card of a prepared source: what the ledger holds, for eyes."""
