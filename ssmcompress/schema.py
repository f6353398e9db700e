"""What all data that users write has in common."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Refuses keys that there are not."""

    model_config = ConfigDict(extra="forbid", frozen=True)
