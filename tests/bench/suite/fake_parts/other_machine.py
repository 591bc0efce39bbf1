def describe():
    return {"device": "another fake", "platform": "test"}
