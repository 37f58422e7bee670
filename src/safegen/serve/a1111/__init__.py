"""The interface of A1111 (`/sdapi/v1`)."""
