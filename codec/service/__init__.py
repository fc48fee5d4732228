"""The codec as an HTTP service with a web page. Needs the extra `serve`: starlette, uvicorn, prometheus-client."""

from calotype.service.app import create_app
from calotype.service.settings import Settings

__all__ = ["Settings", "create_app"]
