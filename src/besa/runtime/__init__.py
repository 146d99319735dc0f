"""Running models as they are packed: sparse linears, loading, generating text, measuring speed."""
