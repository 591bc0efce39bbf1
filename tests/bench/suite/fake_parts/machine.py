def describe():
    return {"device": "fake", "platform": "test"}
