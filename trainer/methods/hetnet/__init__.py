"""HetNet-style detection: a local and a global teacher, their fusion, and a student that recalls good parts only."""
