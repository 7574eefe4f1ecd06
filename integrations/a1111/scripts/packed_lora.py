"""What the host runs at its start: from then on `<lora:name:1>` reads packed files too."""

from lora_compress_webui import register

register()
