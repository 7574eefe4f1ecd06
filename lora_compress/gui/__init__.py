"""A page in the browser that makes LoRA files smaller; `offers` and `work` need no Gradio, `page` and `server` do."""
